"""Names of files in well-known data sets, which all pair without options; `segkit check` names the data set.

Patterns are of the ends of paths: `*` is any text without a slash, `ID` the number or name of a case. `seen`: the names
were read in listings of the files or in programs for them; else they are from the description of the data set. Left
out, as we are not sure of their names or files cannot be paired by name: M&Ms-1 (4D images whose 4D labels hold two
time points), HECKTOR, ATLAS, CAMUS, and BRATS before 2012.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from segkit.reading.case import Cohort

_LEAST_SHARE = 0.5


@dataclass(frozen=True)
class DataSet:
    """A data set: the names of its images and labels, where they are from, and whether files were seen."""

    name: str
    image: str
    label: str
    source: str
    seen: bool = True

    @cached_property
    def patterns(self) -> tuple[re.Pattern[str], re.Pattern[str]]:
        """Regular expressions of the end of a path, for images and for labels."""
        parts = ([re.escape(part) for part in pattern.split("*")] for pattern in (self.image, self.label))
        image, label = ("[^/]*".join(part).replace("ID", r"[\w-]+") for part in parts)
        return re.compile(rf"(^|.*/){image}", re.IGNORECASE), re.compile(rf"(^|.*/){label}", re.IGNORECASE)


DATA_SETS: tuple[DataSet, ...] = (
    DataSet("LiTS", "volume-ID.nii*", "segmentation-ID.nii*", "CodaLab competition 17094"),
    DataSet("BTCV", "img/imgID.nii*", "label/labelID.nii*", "Synapse syn3193805"),
    DataSet("KiTS", "case_ID/imaging.nii.gz", "case_ID/segmentation.nii.gz", "github.com/neheller/kits23"),
    DataSet("AMOS", "imagesTr/amos_ID.nii.gz", "labelsTr/amos_ID.nii.gz", "Zenodo 7155725"),
    DataSet("FLARE", "*/FLARE22_Tr_ID_0000.nii.gz", "*/FLARE22_Tr_ID.nii.gz", "FLARE22 grand challenge"),
    DataSet("ACDC", "patientID/patientID_frame*.nii*", "patientID/patientID_frame*_gt.nii*", "Bernard 2018"),
    DataSet("M&Ms-2", "ID/ID_*A_E*.nii.gz", "ID/ID_*A_E*_gt.nii.gz", "M&Ms-2 challenge"),
    DataSet("PROMISE12", "CaseID.mh*", "CaseID_segmentation.mh*", "PROMISE12 grand challenge"),
    DataSet("ISLES 2022", "sub-strokecaseID/*/dwi/*_dwi.nii.gz", "sub-strokecaseID/*/*_msk.nii.gz", "Zenodo 7153326"),
    DataSet("WMH 2017", "ID/pre/FLAIR.nii.gz", "ID/wmh.nii.gz", "WMH segmentation challenge"),
    DataSet("UCSF-PDGM", "UCSF-PDGM-ID_FLAIR.nii.gz", "UCSF-PDGM-ID_tumor_segmentation.nii.gz", "TCIA UCSF-PDGM"),
    DataSet("UPENN-GBM", "UPENN-GBM-ID_FLAIR.nii.gz", "UPENN-GBM-ID_segm.nii.gz", "TCIA UPENN-GBM"),
    DataSet("RHUH-GBM", "RHUH-ID_flair.nii.gz", "RHUH-ID_segmentations.nii.gz", "TCIA RHUH-GBM"),
    DataSet("MU-Glioma-Post", "PatientID_ID_brain_t2f.nii.gz", "PatientID_ID_tumorMask.nii.gz", "TCIA MU-Glioma-Post"),
    DataSet("PI-CAI", "ID/ID_t2w.mha", "*_expert/*/ID.nii.gz", "github.com/DIAGNijmegen/picai_labels"),
    DataSet("TotalSegmentator", "sID/ct.nii.gz", "sID/segmentations/*.nii.gz", "Zenodo 6802613"),
    DataSet("ISIC 2018", "*_Input*/ISIC_ID.jpg", "*_GroundTruth*/ISIC_ID_segmentation.png", "isic-archive.com"),
    DataSet("Kvasir-SEG", "images/cjuID.jpg", "masks/cjuID.*", "datasets.simula.no/kvasir-seg", seen=False),
    DataSet("DRIVE", "images/ID_*.tif", "1st_manual/ID_manual1.gif", "DRIVE grand challenge"),
    DataSet("STARE", "imID.ppm", "imID.*h.ppm", "cecas.clemson.edu/~ahoover/stare", seen=False),
    DataSet("HRF", "images/ID_*.jpg", "manual1/ID_*.tif", "www5.cs.fau.de/research/data/fundus-images"),
)
"""The table, which `docs/layouts.md` shows."""


def data_set_of(cohort: Cohort) -> DataSet | None:
    """The data set whose names at least half of the references have, and an image of their case; None for others."""
    pairs = [
        ([image.path.as_posix() for image in case.images.values()], [path.as_posix() for path in case.label.paths()])
        for case in cohort.cases
        if case.label is not None
    ]
    counts = [sum(_fits(one, *pair) for pair in pairs) for one in DATA_SETS]
    best = max(counts, default=0)
    return DATA_SETS[counts.index(best)] if pairs and best >= _LEAST_SHARE * len(pairs) else None


def _fits(data_set: DataSet, images: Sequence[str], labels: Sequence[str]) -> bool:
    image, label = data_set.patterns
    return any(map(image.fullmatch, images)) and any(map(label.fullmatch, labels))
