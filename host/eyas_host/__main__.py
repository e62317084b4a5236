"""`python -m eyas_host` is `eyas`; also what `torchrun -m eyas_host` starts."""

from eyas_host.cli.app import main

if __name__ == "__main__":
    main()
