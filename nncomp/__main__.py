"`python -m nncomp`: the command `nncomp` of this very Python, where no script is on the path."
import sys

from nncomp import command

if __name__ == "__main__": sys.exit(command())
