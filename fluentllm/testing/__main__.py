"""The process in which a conformance suite makes the other end of a transport."""

import sys

from .ends import serve

if __name__ == "__main__":
    serve(*sys.argv[1:])
