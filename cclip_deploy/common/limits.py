"""Limits on inputs, checked before memory or time is spent on them."""

from __future__ import annotations

MAX_THREADS = 1024
"""CPU threads of a backend."""
LARGEST_IMAGE_SIDE = 4096
"""Height or width of the network's input, in pixels."""

MAX_PIXELS = 2**26
"""Pixels of an image."""
MAX_VALUES = 2**27
"""Pixels of an image times its channels: 512 MiB as float32."""
MAX_SIDE = 2**15
"""Height or width of an image, in pixels."""
LARGEST_PICTURE_FILE = 2**29
"""Bytes of an image file."""
MOST_PICTURE_BYTES = 2**29
"""Bytes of all images read ahead, and of all masks and probability maps waiting to be written."""

MOST_MASK_BYTES = 2**32
"""Bytes of the masks of all rows of one image during evaluation."""

LARGEST_TABLE = 2**26
"""Bytes of a table file, and of the unpacked parts of an Excel workbook."""
LONGEST_LINE = 2**20
"""Characters in a line of a table."""
MOST_ROWS = 500_000
MOST_CELLS = 2**22
"""Rows of a table times its widest row, and commas in a CSV table."""
LONGEST_CELL = 2**15
"""Characters in a cell of an Excel workbook; Excel has the same limit."""
MOST_ELEMENTS = 2**20
"""XML elements in a part of an Excel workbook; a filled cell has two."""
LARGEST_JSON = 2**25
"""Bytes of a JSON document."""
MOST_JSON_VALUES = 2**21
LARGEST_TOML = 2**18
"""Bytes of a TOML file."""
MOST_KEY_PARTS = 64
"""Parts of a dotted TOML key; the parsing time of `tomllib` is quadratic in their number."""

LONGEST_PROMPT = 10_000
"""Characters in a prompt; CLIP accepts 77 tokens, about 400 characters."""
