"""Imported last in the fork server: keeps what is there out of the workers' garbage collection.

A collection writes to every object that it looks at, so each worker would soon have a copy of its
own of the pages that torch's hundreds of thousands of objects are in.
"""

import gc

gc.collect()
gc.freeze()
