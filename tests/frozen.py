"""Imported last by a process that is forked: what it holds is left alone by the collector, so that forks need not copy it."""

import gc

gc.collect()
gc.freeze()
