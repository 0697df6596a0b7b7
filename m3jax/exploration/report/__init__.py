"""What an exploration leaves behind: trials, table, picture, winner."""
