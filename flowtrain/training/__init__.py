"""What ``flowtrain train`` and its dry run consist of."""
