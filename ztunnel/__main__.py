"""`python -m ztunnel`: the node daemon. Settings come from the environment (see ztunnel/config.py).

As process 1, of a container, it parts in two before anything else is loaded (ztunnel/process1.py).
"""

import sys

from ztunnel import process1

if __name__ == "__main__":
    process1.enter()
    from ztunnel.node import main

    sys.exit(main(sys.argv[1:]))
