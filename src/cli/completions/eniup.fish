# Completion of eniup(8) in fish: eniup itself says what may come next.
function __eniup_complete
    set -lx PATH $PATH /usr/local/sbin /usr/sbin /sbin
    eniup complete -- (commandline --current-process --tokenize --cut-at-cursor) (commandline --current-token --cut-at-cursor) 2>/dev/null
end
complete --command eniup --no-files --keep-order --arguments '(__eniup_complete)'
