"""`python -m mblm` is `mblm`."""

from mblm.cli import main

if __name__ == "__main__":
    main()
