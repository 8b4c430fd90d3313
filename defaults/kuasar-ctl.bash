# Completion of kuasar-ctl for bash; "kuasar-ctl completion bash" prints it.
_kuasar_ctl() {
    local cur=${COMP_WORDS[COMP_CWORD]} prev=${COMP_WORDS[COMP_CWORD-1]}
    local command= operand= dir= words= options= i
    for ((i = 1; i < COMP_CWORD; i++)); do
        case ${COMP_WORDS[i]} in
            --dir|-dir) dir=${COMP_WORDS[++i]} ;;
            --config|--listen|-o|--handler|-e|-n) ((i++)) ;;
            -*) ;;
            *) if [[ -z $command ]]; then command=${COMP_WORDS[i]}; else operand=1; fi ;;
        esac
    done
    COMPREPLY=()
    case $prev in
        -o) COMPREPLY=($(compgen -W "text json" -- "$cur")); return ;;
        --dir|-dir) COMPREPLY=($(compgen -d -- "$cur")); return ;;
        --config|--listen) COMPREPLY=($(compgen -f -- "$cur")); return ;;
    esac
    case $command:$prev in
        setup:--handler) return ;;
        console:-e) return ;;
        logs:-n) return ;;
    esac
    if [[ -z $command ]]; then
        COMPREPLY=($(compgen -W "check setup list inspect console logs gc metrics completion version help --dir -o --version --help" -- "$cur"))
        return
    fi
    case $command in
        check) options="--config --dir --listen -o" ;;
        setup) options="--config --dir --dry-run --handler --listen -o" ;;
        list) options="--dir -o -q" ;;
        inspect) options="--dir -o" ;;
        console) options="--dir -e -o" ;;
        logs) options="--dir -f -n -o --raw" ;;
        gc) options="--dir --dry-run -o --records --yes" ;;
        metrics) options="--dir -o" ;;
        completion) options="--dir -o" ;;
        version) options="--dir -o" ;;
    esac
    if [[ $cur == -* ]]; then
        COMPREPLY=($(compgen -W "$options --help" -- "$cur"))
        return
    fi
    if [[ -n $operand ]]; then
        return
    fi
    case $command in
        setup) words="isulad containerd" ;;
        inspect) words=$(kuasar-ctl ${dir:+--dir "$dir"} list -q 2>/dev/null) ;;
        console) words=$(kuasar-ctl ${dir:+--dir "$dir"} list -q 2>/dev/null) ;;
        logs) words=$(kuasar-ctl ${dir:+--dir "$dir"} list -q 2>/dev/null) ;;
        completion) words="bash" ;;
        help) words="check setup list inspect console logs gc metrics completion version" ;;
    esac
    COMPREPLY=($(compgen -W "$words" -- "$cur"))
}
complete -F _kuasar_ctl kuasar-ctl
