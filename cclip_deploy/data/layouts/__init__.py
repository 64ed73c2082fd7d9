"""Data-set layouts: from a folder to referrals, that is an image, a sentence, and the mask of what it refers to."""

from cclip_deploy.data.layouts.flat import FLAT_COLUMNS, TABLE_NAME, read_flat
from cclip_deploy.data.layouts.mask_file import is_lossy, read_mask
from cclip_deploy.data.layouts.reading import LAYOUTS, DataSet, find_layout, read_data_set
from cclip_deploy.data.layouts.referral import SPLITS, Referral, of_split

__all__ = [
    "FLAT_COLUMNS",
    "LAYOUTS",
    "SPLITS",
    "TABLE_NAME",
    "DataSet",
    "Referral",
    "find_layout",
    "is_lossy",
    "of_split",
    "read_data_set",
    "read_flat",
    "read_mask",
]
