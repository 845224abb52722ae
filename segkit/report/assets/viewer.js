"use strict";
// The viewer of the worst cases. The page has NiiVue and the volumes as gzipped data, which are unpacked when the reader
// scrolls to the viewer; without WebGL 2 there are the still pictures.
(() => {
  const by = (id) => document.getElementById(id);
  const canvas = by("viewer-canvas");
  const message = by("viewer-message");
  const picker = by("viewer-case");
  const facts = JSON.parse(by("viewer-facts").textContent);
  const layersBox = by("viewer-layers");
  const shown = { prediction: true, reference: false, difference: false, uncertainty: false };
  let viewer = null;
  let current = null;
  let masksHidden = false;

  const bytes = (id) => Uint8Array.from(atob(by(id).textContent), (letter) => letter.charCodeAt(0));

  async function load() {
    const stream = new Blob([bytes("viewer-module")]).stream().pipeThrough(new DecompressionStream("gzip"));
    const script = new Blob([await new Response(stream).blob()], { type: "text/javascript" });
    const address = URL.createObjectURL(script);
    const { Niivue } = await import(address);
    URL.revokeObjectURL(address);
    const made = new Niivue({
      isRadiologicalConvention: true,
      sagittalNoseLeft: true,
      backColor: [0, 0, 0, 1],
      crosshairColor: [0.9, 0.9, 0.9, 1],
      crosshairWidthUnit: "percent",
      crosshairWidth: 0.6,
      crosshairGap: 5,
      fontColor: [1, 1, 1, 1],
      show3Dcrosshair: true,
      multiplanarShowRender: 1,
      multiplanarForceRender: true,
      multiplanarPadPixels: 6,
      dragAndDropEnabled: false,
      scrollRequiresFocus: true,
      loadingText: "",
      logLevel: "error",
      isColorbar: false,
    });
    made.onLocationChange = showValues;
    await made.attachToCanvas(canvas);
    return made;
  }

  const labelsOf = (layer) => (layer === "difference" ? facts.differences : facts.labels);

  function palette(layer) {
    const map = { R: [0], G: [0], B: [0], A: [0], I: [0], labels: [""] };
    for (const [value, { name, colour }] of Object.entries(labelsOf(layer))) {
      map.R.push(parseInt(colour.slice(1, 3), 16));
      map.G.push(parseInt(colour.slice(3, 5), 16));
      map.B.push(parseInt(colour.slice(5, 7), 16));
      map.A.push(255);
      map.I.push(Number(value));
      map.labels.push(name);
    }
    return map;
  }

  async function open(key) {
    const entry = facts.cases.find((one) => one.key === key);
    picker.value = key;
    current = null;
    message.textContent = `Opening ${entry.id} …`;
    message.hidden = false;
    for (const volume of [...viewer.volumes]) viewer.removeVolume(volume);
    const addresses = [];
    const list = entry.layers.map((layer) => {
      const address = URL.createObjectURL(new Blob([bytes(`${key}-${layer}`)]));
      addresses.push(address);
      const base = { url: address, name: `${layer}.nii.gz`, opacity: 1 };
      if (layer === "image") return { ...base, colormap: "gray", cal_min: entry.window[0], cal_max: entry.window[1] };
      return layer === "uncertainty" ? { ...base, colormap: "warm", cal_min: 0.02, cal_max: 1 } : base;
    });
    await viewer.loadVolumes(list);
    for (const address of addresses) URL.revokeObjectURL(address);
    entry.layers.forEach((layer, index) => {
      if (layer in shown && layer !== "uncertainty") viewer.volumes[index].setColormapLabel(palette(layer));
    });
    viewer.updateGLVolume();
    current = entry;
    listLayers();
    setWindow(entry.window[0], entry.window[1]);
    for (const end of ["viewer-low", "viewer-high"]) {
      [by(end).min, by(end).max] = entry.range;
    }
    [by("viewer-low").value, by("viewer-high").value] = entry.window;
    applyOpacity();
    centre();
    message.hidden = true;
  }

  function centre() {
    viewer.scene.crosshairPos = viewer.mm2frac(current.centre_mm);
    viewer.createOnLocationChange();
    viewer.drawScene();
  }

  function listLayers() {
    for (const label of layersBox.querySelectorAll("label")) label.remove();
    for (const layer of current.layers) {
      if (!(layer in shown)) continue;
      const label = document.createElement("label");
      const box = document.createElement("input");
      box.type = "checkbox";
      box.checked = shown[layer];
      box.addEventListener("change", () => {
        shown[layer] = box.checked;
        masksHidden = false;
        applyOpacity();
      });
      label.append(box, layer);
      layersBox.append(label);
    }
  }

  function applyOpacity() {
    if (!current) return;
    const opacity = Number(by("viewer-opacity").value);
    current.layers.forEach((layer, index) => {
      if (index > 0) viewer.setOpacity(index, shown[layer] && !masksHidden ? opacity : 0);
    });
  }

  function setWindow(low, high) {
    const image = viewer.volumes[0];
    image.cal_min = Math.min(low, high - 1e-6);
    image.cal_max = high;
    viewer.updateGLVolume();
  }

  function showValues(place) {
    if (!current) return;
    const written = place.values.map((value, index) => {
      const layer = current.layers[index];
      if (layer === "image") return `${current.modality} ${Number(value.value.toPrecision(4))}`;
      if (layer === "uncertainty") return `uncertainty ${value.value.toFixed(2)}`;
      const known = labelsOf(layer)[String(Math.round(value.value))];
      return `${layer} ${known ? known.name : Math.round(value.value) || "–"}`;
    });
    const millimetres = [...place.mm].slice(0, 3).map((value) => value.toFixed(1));
    const thinned = current.step > 1 ? ` · one in ${current.step} voxels along each axis` : "";
    by("viewer-readout").textContent = `${written.join(" · ")} · at ${millimetres.join(", ")} mm${thinned}`;
  }

  function reset() {
    by("viewer-opacity").value = 0.5;
    viewer.setPan2Dxyzmm([0, 0, 0, 1]);
    masksHidden = false;
    [by("viewer-low").value, by("viewer-high").value] = current.window;
    setWindow(...current.window);
    applyOpacity();
    centre();
  }

  const STEPS = {
    ArrowLeft: [1, 0, 0], ArrowRight: [-1, 0, 0], ArrowUp: [0, 1, 0], ArrowDown: [0, -1, 0],
    PageUp: [0, 0, 1], PageDown: [0, 0, -1],
  };

  function press(event) {
    if (!viewer || !current || event.ctrlKey || event.metaKey || event.altKey) return;
    const opacity = by("viewer-opacity");
    if (event.key in STEPS) viewer.moveCrosshairInVox(...STEPS[event.key]);
    else if (event.key === "+" || event.key === "-") {
      opacity.value = Number(opacity.value) + (event.key === "+" ? 0.1 : -0.1);
      applyOpacity();
    } else if (/^[1-4]$/.test(event.key)) layersBox.querySelectorAll("input")[event.key - 1]?.click();
    else if (event.key.toLowerCase() === "m") {
      masksHidden = !masksHidden;
      applyOpacity();
    } else if (event.key.toLowerCase() === "r") reset();
    else return;
    event.preventDefault();
    event.stopImmediatePropagation();
  }

  function fail(reason) {
    message.hidden = false;
    message.textContent = `The viewer cannot run here (${reason}). The still pictures below show the same cases.`;
    for (const button of document.querySelectorAll(".needs-viewer")) button.hidden = true;
  }

  let starting = null;
  function start() {
    starting ??= (async () => {
      if (!document.createElement("canvas").getContext("webgl2")) throw new Error("this browser has no WebGL 2");
      message.textContent = "Starting …";
      viewer = await load();
      await open(picker.value);
    })();
    starting.catch((error) => fail(error.message));
    return starting;
  }

  let queue = Promise.resolve();
  function show(key) {
    queue = queue.then(start).then(() => open(key));
    queue.catch((error) => fail(error.message));
    return queue;
  }

  canvas.addEventListener("keydown", press, true);
  picker.addEventListener("change", () => show(picker.value));
  by("viewer-opacity").addEventListener("input", applyOpacity);
  for (const end of ["viewer-low", "viewer-high"]) {
    by(end).addEventListener("input", () => current && setWindow(Number(by("viewer-low").value), Number(by("viewer-high").value)));
  }
  by("viewer-reset").addEventListener("click", () => current && reset());
  by("viewer-views").addEventListener("change", (event) => viewer && viewer.setSliceType(Number(event.target.value)));
  for (const button of document.querySelectorAll(".needs-viewer")) {
    button.addEventListener("click", () => {
      by("viewer").scrollIntoView();
      show(button.dataset.view).then(() => canvas.focus({ preventScroll: true }));
    });
  }
  new IntersectionObserver((entries, observer) => {
    if (entries.some((entry) => entry.isIntersecting)) {
      observer.disconnect();
      start();
    }
  }).observe(canvas);
})();
