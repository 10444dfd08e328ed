"""The remote notebook kernel: the laptop's side (provisioner, bridge) and the confidential VM's (service, spawner)."""
