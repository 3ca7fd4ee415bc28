"""The subcommands of `kd-assets`, a module each but for those of the control plane; `kd_assets.cli` lists them."""
