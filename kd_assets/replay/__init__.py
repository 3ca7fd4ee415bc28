"""The replay server: answers from a top-k cache what trainers ask of an online teacher. No torch, no dagster."""
