# shellcheck shell=bash disable=SC2154 # launch.sh sets attempt, checkpoints and state
# Which checkpoint a start goes on from, and whether starts get anywhere. Sourced by launch.sh.
#
# Megatron writes iter_0000500/, its metadata.json last, and then the tracker, which it truncates
# first. A save that was killed leaves a folder without metadata, a whole one that the tracker does
# not name yet, or an empty tracker, at which Megatron would end with status 0.
tracker_name=latest_checkpointed_iteration.txt

# whole FOLDER: whether a torch_dist checkpoint was written to its end.
whole() {
    [[ -s $1/.metadata && -s $1/metadata.json && $(tail -c 1 "$1/metadata.json") == "}" ]]
}

# settle_tracker FOLDER: have the tracker name a whole checkpoint: its own where that is one, otherwise
# the newest. A newer one that it does not name stays unused: someone may have gone back on purpose.
settle_tracker() {
    local named folder newest="" iteration
    named=$(cat "$1/$tracker_name" 2>/dev/null)
    if [[ $named =~ ^[0-9]+$ ]] && whole "$1/$(printf 'iter_%07d' "$((10#$named))")"; then
        return
    fi
    # Seven digits and more: by number, not by name.
    while IFS= read -r folder; do
        if whole "$folder"; then newest=$folder; fi
    done < <(find "$1" -maxdepth 1 -type d -name 'iter_*' | sort -V)
    if [[ -z $newest ]]; then
        [[ ! -e $1/$tracker_name ]] && return
        say "$1/$tracker_name says '$named', and no checkpoint in $1 is whole. Remove it to train from the beginning" >&2
        return 1
    fi
    iteration=$((10#${newest##*_}))
    say "$1/$tracker_name says '$named', which is no whole checkpoint; going on from $newest"
    # Renamed into place: at no moment is there half a tracker.
    printf '%d' "$iteration" >"$1/.$tracker_name" && mv "$1/.$tracker_name" "$1/$tracker_name"
}

# latest_iteration: of the run's last good checkpoint; 0 without one.
latest_iteration() {
    local named
    named=$(cat "$checkpoints/$tracker_name" 2>/dev/null)
    if [[ $named =~ ^[0-9]+$ ]]; then echo "$((10#$named))"; else echo 0; fi
}

# count_attempt: sets `started_from`, and `fruitless`, this and the starts before it that began there.
# A new submission counts from one. Here and not only at the end, since SLURM also requeues by itself,
# when a node dies, and then nothing of this script runs.
count_attempt() {
    local file=$state/$SLURM_JOB_ID.attempts before=-1 count=0
    started_from=$(latest_iteration)
    if ((attempt > 0)) && [[ -s $file ]]; then read -r before count <"$file"; fi
    if ((before != started_from)); then count=0; fi
    fruitless=$((count + 1))
    printf '%d %d\n' "$started_from" "$fruitless" >"$file"
    ((fruitless <= JOB_MAX_ATTEMPTS)) ||
        fail "given up: $((fruitless - 1)) starts in a row got no further than iteration $started_from (JOB_MAX_ATTEMPTS=$JOB_MAX_ATTEMPTS)"
}
