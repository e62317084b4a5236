"""Benchmarks of a bundle on this device: `eyas-device bench`.

measure.py    interleaved measurement of artefacts: the model alone, and whole frames stage by stage
sustained.py  minutes at full rate, interval by interval, with temperature and frequency
start.py      fresh processes: time from import to the first prediction, and memory
choose.py     selection of the fastest artefact that passes the golden check
blocks.py     latency of the blocks of a model
result.py     the result file; compare.py and show.py turn it into tables
"""
