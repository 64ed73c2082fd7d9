"""Limits on what users and their files may ask for; each is checked before the memory or the time is spent."""

from __future__ import annotations

MOST_THREADS = 1024
"""CPU threads of a runtime."""
LARGEST_IMAGE_SIDE = 4096
"""Pixels of a side of the network's input."""

MAX_PIXELS = 2**26
"""Pixels of a picture."""
MAX_VALUES = 2**27
"""Pixels of a picture times its channels: 512 MiB as float32."""
MAX_SIDE = 2**15
"""Pixels of a side of a picture."""
LARGEST_PICTURE_FILE = 2**29
"""Bytes of a picture's file."""
MOST_PICTURE_BYTES = 2**29
"""Bytes of all pictures, masks and probabilities that are read ahead or wait to be written."""

MOST_MASK_BYTES = 2**32
"""Bytes of the masks of one picture's rows, while they are measured."""

LARGEST_TABLE = 2**26
"""Bytes of a table's file, and of an Excel workbook's parts once they are unpacked."""
LONGEST_LINE = 2**20
"""Characters of a line of a table."""
MOST_ROWS = 500_000
MOST_CELLS = 2**22
"""Of a table: rows times the widest row, and commas of a CSV table."""
LONGEST_CELL = 2**15
"""Characters of a cell of an Excel workbook, as Excel itself allows."""
MOST_ELEMENTS = 2**20
"""XML elements of a part of an Excel workbook; a filled cell has two."""
LARGEST_JSON = 2**25
"""Bytes of a JSON document."""
MOST_JSON_VALUES = 2**21
LARGEST_TOML = 2**18
"""Bytes of a TOML file."""
MOST_KEY_PARTS = 64
"""Parts of a dotted TOML key; the time that `tomllib` takes grows with their square."""

LONGEST_PROMPT = 10_000
"""Characters of a prompt; CLIP takes 77 tokens, about 400 characters."""
