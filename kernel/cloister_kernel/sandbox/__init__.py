"""What a notebook kernel's process takes from itself before user code runs: files, network, system calls."""
