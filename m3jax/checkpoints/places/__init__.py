"""Files and where they are: disks, object stores, the hub."""
