"""Getting models onto devices: the first flash over ssh, and benchmarks that run there.

`ssh.py` is one connection, `preflight.py` says whether a device is fit, `wheels.py` makes what is installed there, and
`flash.py` puts it all in order.
"""
