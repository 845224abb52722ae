"""segkit's data in MONAI: lists of cases, and the reading and preprocessing of segkit as dictionary transforms."""

from segkit.monai.data import as_dataset, datalist
from segkit.monai.transforms import LoadCased, Prepared

__all__ = ["LoadCased", "Prepared", "as_dataset", "datalist"]
