"""What a bundle costs on this device: `eyas-device bench`.

measure.py    artefacts taking turns: the model alone, and the whole frame stage by stage
sustained.py  minutes at full rate, an interval at a time, with temperature and frequency
start.py      a fresh process: import to first answer, and its memory
choose.py     the fastest runtime and precision that answers rightly, remembered
blocks.py     where the time goes inside of the model
result.py     what is written and read back; compare.py and show.py turn it into tables
"""
