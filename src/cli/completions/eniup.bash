# Completion of eniup(8) in bash: eniup itself says what may come next.
_eniup() {
    local line=${COMP_LINE:0:COMP_POINT} words current
    IFS=$' \t\n' read -ra words <<<"$line"
    [[ $line == *[[:space:]] ]] && words+=("")
    current=${words[${#words[@]} - 1]}
    mapfile -t COMPREPLY < <(PATH=$PATH:/usr/local/sbin:/usr/sbin:/sbin eniup complete -- "${words[@]}" 2>/dev/null)
    # What is said of each stands behind a tab.
    COMPREPLY=("${COMPREPLY[@]%%$'\t'*}")
    # For bash a word begins behind a colon or an equals sign, as COMP_WORDBREAKS says.
    if [[ $current == *[:=]* ]]; then
        COMPREPLY=("${COMPREPLY[@]#"${current%"${current##*[:=]}"}"}")
    fi
    if [[ ${#COMPREPLY[@]} -eq 1 && ${COMPREPLY[0]} == *[/=] ]]; then
        compopt -o nospace 2>/dev/null
    fi
}
complete -F _eniup eniup
