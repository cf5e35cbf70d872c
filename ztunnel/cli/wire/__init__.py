"""Looking at what is on a link: frames from the kernel, TCP segments in them, flows made of those."""
