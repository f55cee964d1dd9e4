# What zsh makes of the line in $1 when somebody presses Tab behind it, on a terminal of its own.
emulate -L zsh
zmodload zsh/zpty
zpty shell zsh -f -i
setup='PS1=; unsetopt zle_bracketed_paste prompt_sp; autoload -Uz compinit; compinit -D -u; source <(eniup completions zsh); '
setup+='shown() { zle complete-word; print -r -- "<<$BUFFER>>"; BUFFER=; }; zle -N shown; bindkey "^I" shown; '
# In two pieces, since the terminal echoes what is typed.
zpty -w shell $setup'print -r -- "re""ady"'
zpty -r shell said '*ready*'
zpty -w -n shell $1$'\t'
zpty -r shell said '*<<*>>*'
said=${said##*<<}
print -r -- ${said%%>>*}
zpty -d shell
