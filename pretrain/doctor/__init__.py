"""``yaware doctor``: what is wrong with this machine, or with the hosts of a job, before the job is started."""
