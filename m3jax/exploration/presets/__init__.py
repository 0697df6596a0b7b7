"""Published searches, each a generator over the loop of `exploration.run`."""
