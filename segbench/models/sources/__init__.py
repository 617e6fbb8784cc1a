"""From a name to a typed source (`names`), and one file for each kind of source that builds its model."""
