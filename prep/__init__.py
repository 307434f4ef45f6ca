"""kprep's conversion: annotation rows and videos in, webdataset shards with an index out."""

__version__ = "0.1.0"
