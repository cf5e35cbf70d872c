"""`python -m cni`: the node agent, of the embedded mesh or (`--kubernetes`) of a node of a cluster."""

import sys

if "--kubernetes" in sys.argv[1:]:
    from cni.lean import import_in_part

    import_in_part()
    from cni.kubernetes import main
else:
    from cni.agent import main

sys.exit(main())
