"""From a model and a data set to finished units: in this process, in shards, on a Ray cluster."""
