"""The demo: ``run.sh`` runs the pipeline on simulated people, ``summary`` prints what came out."""
