"""What Hypercell brings to people's own Jupyter: a connection class for the gateway's WebSocket and a provisioner."""
