#!/bin/bash
# Pretraining on several nodes under SLURM, one torchrun per node:
#
#   sbatch --nodes=8 scripts/slurm.sh mae_vit_large data=/imagenet/train out=/shared/runs
#
# `out` must be on a file system that all nodes see. Two minutes before the time is up SLURM sends
# TERM: the run finishes its step and saves, and the job is queued again, where --resume goes on.
# A rank that dies is restarted with all others up to three times, from the last checkpoint.
#SBATCH --job-name=fastssl
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=96
#SBATCH --time=24:00:00
#SBATCH --signal=B:TERM@120
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log

set -u
master=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
# Restarted ranks must not find the addresses of those that died.
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-8}"
# Of itself srun does not take what the job asked for since SLURM 22.05, but one core.
export SRUN_CPUS_PER_TASK="${SRUN_CPUS_PER_TASK:-${SLURM_CPUS_PER_TASK:-1}}"

# Each node's torchrun leaves its number behind, for `stop`.
agent='echo $$ > "/tmp/fastssl-$SLURM_JOB_ID.pid"; exec torchrun "$@"'
srun --kill-on-bad-exit=1 bash -c "$agent" bash \
    --nnodes="$SLURM_NNODES" \
    --nproc-per-node="${GPUS_PER_NODE:-gpu}" \
    --rdzv-backend=c10d \
    --rdzv-endpoint="$master:${MASTER_PORT:-29500}" \
    --rdzv-id="$SLURM_JOB_ID-${SLURM_RESTART_COUNT:-0}" \
    --max-restarts="${MAX_RESTARTS:-3}" \
    -m fastssl.cli "$@" --resume &
steps=$!

# To the ranks, which are the children of torchrun: itself it would end them after 30 seconds.
ranks='pkill -TERM -P "$(cat "/tmp/fastssl-$SLURM_JOB_ID.pid")"'
stopped=0
stop() {
    stopped=1
    srun --overlap --ntasks-per-node=1 bash -c "$ranks"
}
trap stop TERM

wait "$steps"
status=$?
while [ "$stopped" = 1 ] && kill -0 "$steps" 2>/dev/null; do
    wait "$steps"
    status=$?
done
if [ "$stopped" = 1 ]; then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
