"""`python -P -m prep` is the same as `kprep`."""

from prep.cli import main

if __name__ == "__main__":
    main()
