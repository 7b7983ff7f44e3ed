"""What the subcommands of `hypercell` do; `hypercell.cli` has their arguments."""
