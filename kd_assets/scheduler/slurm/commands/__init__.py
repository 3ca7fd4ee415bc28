"""SLURM's commands: run somewhere (`runners`), asked (`client`), their text (`parsing`) and state words (`states`)."""
