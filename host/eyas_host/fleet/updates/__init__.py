"""The signed repository of releases: its keys, what is published in it, and how it is renewed and verified."""
