"""The layers that confine a notebook kernel, one module each."""
