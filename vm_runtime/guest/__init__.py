"""What runs inside the machine: init, agent, zygote and kernel. Standard library and ipykernel."""
