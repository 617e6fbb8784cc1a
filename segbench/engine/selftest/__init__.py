"""Does segbench compute what it should on this machine? Everything else was tested on CPUs; this runs on the user's."""
