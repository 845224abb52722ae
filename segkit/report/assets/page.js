"use strict";
// Sorting and filtering of the table of cases, links to cases, and reloading; everything else works without a script.
(() => {
  const table = document.getElementById("case-table");
  const search = document.getElementById("case-search");
  const region = document.getElementById("case-region");
  const count = document.getElementById("case-count");

  function filter() {
    const wanted = search.value.trim().toLowerCase();
    let shown = 0;
    let all = 0;
    for (const row of table.tBodies[0].rows) {
      const fits = !region || row.dataset.region === region.value;
      const named = row.cells[0].textContent.toLowerCase().includes(wanted);
      row.hidden = !(fits && named);
      all += fits;
      shown += fits && named;
    }
    const cases = all === 1 ? "case" : "cases";
    count.textContent = shown === all ? `${all} ${cases}` : `${shown} of ${all} ${cases}`;
  }

  function sort(heading) {
    const direction = heading.getAttribute("aria-sort") === "ascending" ? -1 : 1;
    for (const other of heading.parentElement.cells) other.setAttribute("aria-sort", "none");
    heading.setAttribute("aria-sort", direction > 0 ? "ascending" : "descending");
    const column = heading.cellIndex;
    const byText = new Intl.Collator(undefined, { numeric: true });
    const compare = (a, b) => {
      const [first, second] = [a.cells[column], b.cells[column]];
      if (heading.dataset.kind === "text") return direction * byText.compare(first.textContent, second.textContent);
      const [left, right] = [first.dataset.value, second.dataset.value];
      if (left === undefined || right === undefined) return (left === undefined) - (right === undefined);
      return direction * (left - right);
    };
    const body = table.tBodies[0];
    body.append(...[...body.rows].sort(compare));
  }

  if (table) {
    for (const heading of table.tHead.rows[0].cells) {
      heading.firstElementChild.addEventListener("click", () => sort(heading));
    }
    search.addEventListener("input", filter);
    if (region) region.addEventListener("change", filter);
    filter();
  }

  function reveal() {
    const target = location.hash.length > 1 && document.getElementById(decodeURIComponent(location.hash.slice(1)));
    if (target && target.tagName === "DETAILS") target.open = true;
  }
  addEventListener("hashchange", reveal);
  reveal();

  const silent = document.getElementById("silent");
  if (silent) {
    const look = () => {
      const seconds = Date.now() / 1000 - Number(silent.dataset.written);
      document.getElementById("silent-minutes").textContent = Math.floor(seconds / 60);
      silent.hidden = seconds < Number(silent.dataset.patience);
      document.getElementById("live").hidden = !silent.hidden;
    };
    look();
    setInterval(look, 10000);
    // Not while something has the focus: a reader would lose their place.
    setInterval(() => document.activeElement === document.body && location.reload(), 30000);
  }

  let closed = [];
  addEventListener("beforeprint", () => {
    closed = [...document.querySelectorAll("details:not([open])")];
    for (const one of closed) one.open = true;
  });
  addEventListener("afterprint", () => {
    for (const one of closed) one.open = false;
  });
})();
