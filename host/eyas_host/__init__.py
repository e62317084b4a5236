"""The workstation side of Eyas: train, distil, compress, compile, prove, report."""
