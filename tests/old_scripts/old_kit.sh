#!/bin/bash
# A step 3 as the kit before this one had it: arrays, the batch size read by its place, a part for conversions.
set -e
ENV=$1
export PYTHONWARNINGS="ignore::FutureWarning"
export CUDA_DEVICE_MAX_CONNECTIONS=1
export NVTE_FLASH_ATTN=1
export CUDA_VISIBLE_DEVICES=0,1,2,3,4,5,6,7
export PYTHONPATH=/workspace/Patch:/workspace/Megatron-LM:$PYTHONPATH

IS_INITIAL_RUN=true
TRAIN_OR_CONVERT_CKPT=train
DATASET_PATH=/data/sft_text_document
LOAD_CHECKPOINT_PATH=/ckpt/start
SAVE_DIST_CHECKPOINT_PATH=/ckpt/run
SAVE_TORCH_CHECKPOINT_PATH=/ckpt/torch
WANDB_SAVE_PATH=/home/wandb_logs

DATA_ARGS=(
    --data-path $DATASET_PATH
    --split 98,2,0
    --seq-length 2048
    --dataset MMAP
)
DISTRIBUTED_ARGS=(
    --nproc_per_node 8
    --nnodes 1
    --node_rank 0
    --master_addr localhost
    --master_port 22222
)
CONFIGJSON_ARGS=(
    --num-layers 4
    --hidden-size 32
    --num-attention-heads 4
    --ffn-hidden-size 64
    --max-position-embeddings 131072
    --group-query-attention
    --num-query-groups 2
    --normalization RMSNorm
    --norm-epsilon 1e-5
    --extra-vocab-size 421
    --untie-embeddings-and-output-weights
    # --use-cpu-initialization
)
ADDITIONAL_ARGS=(
    --swiglu
    --position-embedding-type rope
    --disable-bias-linear
    --add-qkv-bias
    --rotary-base 1000000
    --max-position-embeddings 32768
    --rotary-percent 1.0
    --rotary-seq-len-interpolation-factor 1
    --patch-tokenizer-type Qwen2Tokenizer
)
TRAINING_ARGS=(
    --bf16
    --micro-batch-size 2
    --global-batch-size 16
    --weight-decay 0.01
    --init-method-std 0.02
    --clip-grad 1.0
    --lr 6.5e-5
    --min-lr 2.5e-6
    --lr-warmup-iters 0
    --lr-decay-style cosine
    --attention-dropout 0.0
    --hidden-dropout 0.0
    --calculate-per-token-loss
    --train-mode finetune
)
num_epoches=3
num_training_samples=154678
train_iters=$(( num_epoches * num_training_samples / ${TRAINING_ARGS[4]} ))    # its fifth word is the batch size
TRAINING_ARGS+=(
    --train-iters $train_iters
)
MODEL_PARALLEL_ARGS=(
    --tensor-model-parallel-size 2
    --pipeline-model-parallel-size 2
    --recompute-activations
    --use-distributed-optimizer
)
if [ ${MODEL_PARALLEL_ARGS[1]} -gt 1 ]; then
    MODEL_PARALLEL_ARGS+=(
        --sequence-parallel
        --context-parallel-size 1
        --tp-comm-overlap
        --overlap-grad-reduce
        --overlap-param-gather
    )
fi
SAVE_ARGS=(
    --save-interval 100
    --eval-iters 50
    --eval-interval 100
    --save $SAVE_DIST_CHECKPOINT_PATH
    --load $LOAD_CHECKPOINT_PATH
    --exit-on-missing-checkpoint
    --auto-detect-ckpt-format
    --log-interval 100
    --log-throughput
)
if [ ${IS_INITIAL_RUN} = true ]; then
    SAVE_ARGS+=(
        --no-load-optim
        --no-load-rng
    )
fi
if [ $TRAIN_OR_CONVERT_CKPT = "train" ]; then
    SAVE_ARGS+=(
        --async-save
        --wandb-project sft
        --wandb-exp-name first
        --wandb-save-dir $WANDB_SAVE_PATH
    )
elif [ $TRAIN_OR_CONVERT_CKPT = "convert" ]; then
    echo "to torch format: $SAVE_TORCH_CHECKPOINT_PATH"
    SAVE_ARGS+=(
        --ckpt-convert-format torch
        --ckpt-convert-save $SAVE_TORCH_CHECKPOINT_PATH
    )
fi

torchrun ${DISTRIBUTED_ARGS[@]} /workspace/Patch/examples/qwen2/pretrain_qwen.py \
    ${DATA_ARGS[@]} \
    ${MODEL_PARALLEL_ARGS[@]} \
    ${CONFIGJSON_ARGS[@]} \
    ${ADDITIONAL_ARGS[@]} \
    ${TRAINING_ARGS[@]} \
    ${SAVE_ARGS[@]} \

set +x


<<'NOTES'
--lr 1 belongs to no command
NOTES
