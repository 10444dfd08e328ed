"""Evidence that a machine is what it says: collect it (in the VM), parse, verify and judge it, bind it to a channel."""
