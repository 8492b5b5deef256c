#!/bin/bash
# A script in the manner of Megatron-LM's examples; its model has nothing of Qwen's, and some flags are not given.
export CUDA_DEVICE_MAX_CONNECTIONS=1
GPUS_PER_NODE=${GPUS_PER_NODE:-8}
NUM_NODES=2
CHECKPOINT_PATH=$1
DATA_PATH=$2

DISTRIBUTED_ARGS=(
    --nproc_per_node $GPUS_PER_NODE
    --nnodes $NUM_NODES
    --node_rank ${NODE_RANK}
    --master_addr node0
    --master_port 6000
)
GPT_MODEL_ARGS=(
    --num-layers 48
    --hidden-size 4096
    --num-attention-heads 32
    --seq-length 2048
    --max-position-embeddings 2048
    --attention-backend auto # any
)
TRAINING_ARGS=(
    --micro-batch-size 1
    --global-batch-size 512
    --rampup-batch-size 16 16 5859375
    --train-samples 1024000
    --lr-warmup-samples 51200
    --weight-decay 0.1
    --fp16
    --lr 6.0e-5
    --num-layers-per-virtual-pipeline-stage 4
    --recompute-num-layer 2
    --num-experts=8
)
torchrun "${DISTRIBUTED_ARGS[@]}" pretrain_gpt.py \
    "${GPT_MODEL_ARGS[@]}" \
    "${TRAINING_ARGS[@]}" \
    --tensor-model-parallel-size 4 \
    --pipeline-model-parallel-size 2 \
    --data-path 0.7 ${DATA_PATH} 0.3 /data/other_text_document \
    --save $CHECKPOINT_PATH --load $CHECKPOINT_PATH \
    ${MORE_ARGS} 2>&1 | tee log.txt
