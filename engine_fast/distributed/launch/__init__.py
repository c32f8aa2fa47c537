"""Start ranks on one host or many through DeepSpeed's runner, torchrun, mpirun or srun, watch them, and clean up.

Three kinds of process, none of which imports torch: the launcher (one, on the user's terminal: `launcher`,
`supervise`), a guard for every rank (`rank`, the parent of the process that trains) and short-lived helpers on each
host (`probe`, `reap`). They speak through one directory on the shared file system (`attempt`): the transports only
start guards, and neither their exit codes nor their signals are relied on.
"""
