"""How each generation of BraTS names its cases: a table of id patterns, label schemes and patients."""

from __future__ import annotations

import re
from dataclasses import dataclass

_PATIENTS = (
    re.compile(r"^BraTS1[789]_(.+?)_\d+$", re.IGNORECASE),
    re.compile(r"^(brats_(?:2012|2013|tcia)_pat\d+)_\d+$", re.IGNORECASE),
    re.compile(r"^(UPENN-GBM-\d+)_\d+$", re.IGNORECASE),
    re.compile(r"^(BraTS-MEN-RT-\d+)-\d+$", re.IGNORECASE),
    re.compile(r"^(BraTS-[A-Za-z]+-\d+)-\d{3}$", re.IGNORECASE),
)


@dataclass(frozen=True)
class Convention:
    """How one generation of BraTS names its cases, and the label scheme it uses."""

    name: str
    description: str
    case_pattern: str
    scheme: str
    example: str
    has_four_modalities: bool = True


CONVENTIONS = (
    Convention(
        "brats2015",
        "BRATS 2012-2015: labels 1-4 with 3 = non-enhancing tumour",
        r"brats_(?:2012|2013|tcia)_pat\d+_\d+",
        "brats2015",
        "brats_2013_pat0001_1/VSD.Brain.XX.O.MR_Flair.54512/*.mha",
    ),
    *(
        Convention(
            f"brats20{year}",
            f"BraTS 20{year}: labels 1, 2, 4",
            rf"BraTS{year}_[A-Za-z0-9]+_[A-Za-z0-9]+_\d+",
            "brats2017",
            f"HGG/BraTS{year}_CBICA_AAB_1/BraTS{year}_CBICA_AAB_1_flair.nii.gz",
        )
        for year in (17, 18, 19)
    ),
    Convention(
        "brats2020",
        "BraTS 2020: labels 1, 2, 4",
        r"BraTS20_(?:Training|Validation|Testing|Test)_\d+",
        "brats2017",
        "BraTS20_Training_001/BraTS20_Training_001_flair.nii.gz",
    ),
    Convention(
        "brats2021",
        "BraTS 2021: labels 1, 2, 4",
        r"BraTS2021_\d+",
        "brats2017",
        "BraTS2021_00000/BraTS2021_00000_flair.nii.gz",
    ),
    Convention(
        "fets2022",
        "FeTS 2021 and 2022: labels 1, 2, 4",
        r"FeTS(?:20)?2[12]_(?:Training_|Validation_)?\d+",
        "brats2017",
        "FeTS2022_00000/FeTS2022_00000_flair.nii.gz",
    ),
    Convention(
        "upenn",
        "UPENN-GBM: images_structural and images_segm, labels 1, 2, 4",
        r"UPENN-GBM-\d+_\d+",
        "brats2017",
        "images_structural/UPENN-GBM-00001_11/UPENN-GBM-00001_11_FLAIR.nii.gz",
    ),
    Convention(
        "brats2023",
        "BraTS 2023 glioma, or several tumour kinds together: labels 1, 2, 3",
        r"BraTS-(?!PED|MEN-RT)[A-Za-z]+-\d+(?:-\d{3})?",
        "brats2023",
        "BraTS-GLI-00000-000/BraTS-GLI-00000-000-t2f.nii.gz",
    ),
    *(
        Convention(
            f"brats2023-{kind}",
            f"BraTS {kind.upper()} of 2023 and later: labels 1, 2, 3" + (" (4 from 2025 on)" if kind == "met" else ""),
            rf"BraTS-{kind.upper()}-\d+-\d{{3}}",
            "brats2023",
            f"BraTS-{kind.upper()}-00000-000/BraTS-{kind.upper()}-00000-000-t2f.nii.gz",
        )
        for kind in ("ssa", "men", "met")
    ),
    Convention(
        "brats2023-ped",
        "BraTS PED of 2023: labels 1, 2, 3",
        r"BraTS-PED-\d+-\d{3}",
        "brats2023",
        "BraTS-PED-00000-000/BraTS-PED-00000-000-t2f.nii.gz",
    ),
    Convention(
        "brats-ped",
        "BraTS PED of 2024 and later: labels 1 ET, 2 NET, 3 CC, 4 ED",
        r"BraTS-PED-\d+-\d{3}",
        "brats-ped",
        "BraTS-PED-00000-000/BraTS-PED-00000-000-t2f.nii.gz",
    ),
    Convention(
        "brats2024",
        "BraTS 2024 and later, glioma after treatment (time point 100 and above): labels 1-4",
        r"BraTS-(?!PED|MEN-RT)[A-Za-z]+-\d+(?:-\d{3})?",
        "brats2024",
        "BraTS-GLI-00000-100/BraTS-GLI-00000-100-t2f.nii.gz",
    ),
    Convention(
        "brats-men-rt",
        "BraTS meningioma radiotherapy: t1c and one label, GTV",
        r"BraTS-MEN-RT-\d+-\d+",
        "brats-men-rt",
        "BraTS-MEN-RT-0000-1/BraTS-MEN-RT-0000-1_t1c.nii.gz",
        has_four_modalities=False,
    ),
    Convention(
        "brats-inpainting",
        "BraTS local synthesis: t1n-voided and mask, with or without the whole t1n",
        r"BraTS-(?!MEN-RT)[A-Za-z]+-\d+(?:-\d{3})?",
        "brats2023",
        "BraTS-GLI-00000-000/BraTS-GLI-00000-000-t1n-voided.nii.gz",
        has_four_modalities=False,
    ),
)


def patient_of(case_id: str) -> str:
    """The patient of a case: time points of one patient share it, and so do BraTS 2017-2019 ids across the years."""
    for pattern in _PATIENTS:
        if match := pattern.match(case_id):
            return match.group(1)
    return case_id
