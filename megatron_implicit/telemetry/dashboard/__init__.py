"""The page that shows all runs, and the Prometheus behind it.

``runs`` finds runs on disk; ``prometheus`` starts Prometheus with the shipped ``rules.yml`` and asks it; ``live`` makes
tables and curves of its answers; ``server`` answers the page in ``assets/``, which has everything it needs (uPlot under
its MIT licence included). ``panels`` says which numbers are drawn together; ``grafana`` makes the same for Grafana,
``report`` freezes a run's page in one file.
"""
