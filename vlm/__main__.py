"""`python -m vlm` is the command `vlm`."""

from vlm.cli.main import command

if __name__ == "__main__":
    command()
