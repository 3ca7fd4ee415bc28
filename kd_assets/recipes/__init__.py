"""A recipe: from its YAML to the frozen form that everything else works with; and a cluster's profile."""
